"""Stand-in Sparks on one Linux machine: real Docker Engines, a real Ray, a real vLLM with a tiny model.

The modules in reading order: shell sandbox engine model hosts image rig flow needs stage picture. `spark/` holds the
programs that start an engine and edit its containers. `standin/` makes the image that replaces NGC's vLLM image.
parse_lines.py runs in that image.
"""
