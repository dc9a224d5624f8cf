"""Everything that runs on a Spark's host: a module per noun, in reading order.

Imports go one way: a module imports only modules that stand before it here. CONTRIBUTING.md says in a line each what
they hold.

    repository command models settings notes         the files, the command lines, and what somebody has set
    links ports engine token node                    one node: its links, its Docker, its container with Ray
    image server served plan guards cleanup          the image, the server in the container, refusals, leftovers
    detached remote transfer ship weights doctor     a node that outlives its terminal, nodes over ssh, bytes
    recorder                                         what every node's recorder has seen
    finding kv_cache memory options readings          what is found out before a model is loaded
    agreement                                        the nodes, compared
    fabric check                                     the same, with the fabric, in one report
    api load health status watch                     what is asked while a model loads and serves
    up                                               all nodes from one terminal

tasks.py and the first three lines are the article's flow, which one sitting reads. `inside/` holds the scripts that run
in the containers, in the containers' Python; it is mounted there, read-only, at /opt/inside.
"""
