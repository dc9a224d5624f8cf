"""What this machine is before a container runs on it: links, ports, Docker Engine. These modules only ask."""
