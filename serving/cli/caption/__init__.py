"""`captioner caption`: captions of files, directories and URLs, by a client with the standard library alone."""
