"""Stand-in Sparks on one Linux machine: network namespaces, a Docker Engine each, and a tiny model for a real vLLM."""
