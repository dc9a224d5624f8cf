"""Two DGX Sparks as one vLLM server: the container, Ray in it, the server, and what is asked first."""
