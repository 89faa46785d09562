"""`captioner doctor`: findings about this machine and its services before anything is loaded."""
