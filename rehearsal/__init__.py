"""Stand-in Sparks on one Linux machine: real Docker Engines, a real Ray, a real vLLM with a tiny model.

In reading order: shell sandbox engine model hosts image rig flow needs stage picture. `spark/` runs beside an engine,
`standin/` makes the image that stands in for NGC's, parse_lines.py runs in the image.
"""
