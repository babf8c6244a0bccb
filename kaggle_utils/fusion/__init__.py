"""How faces and a voice become one probability."""
