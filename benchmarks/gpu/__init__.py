"""The first hour on a machine with GPUs: what no test here can show, in a resumable run with one report."""
