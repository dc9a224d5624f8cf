"""All nodes from one terminal: the head brings the others up and down over ssh, by this repository's own tasks."""
