# For login shells, which start from a PATH of their own.
PATH=/opt/captioner/bin:$PATH
