"""Private and undocumented names of vLLM, Ray, uvicorn and HAProxy that serving/ relies on."""
