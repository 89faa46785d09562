# For login shells, which reset PATH.
PATH=/opt/captioner/bin:$PATH
