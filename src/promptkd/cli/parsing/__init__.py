"""How a command line and a YAML file are read, and the help that explains them."""
