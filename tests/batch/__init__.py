"""Tests of stored files and batches."""
