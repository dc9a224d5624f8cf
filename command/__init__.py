"""A command line from template to process: `template` writes its words, `run` shows them, starts or becomes them."""
