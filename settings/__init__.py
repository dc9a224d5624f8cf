"""What the operator, the site and the model's profile say: the only place with names, defaults and precedence."""
