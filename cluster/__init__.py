"""Two DGX Sparks as one vLLM server: settings, command lines, and the questions asked before they run."""
