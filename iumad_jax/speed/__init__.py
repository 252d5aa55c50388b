"""How long things take, one command each."""
