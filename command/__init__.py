"""A command line from template to process: `template` writes its words, `command` shows them, `run` starts them."""
