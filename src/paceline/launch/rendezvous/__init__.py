"""Several machines become one run: their launchers meet in one store, agree, and look after each other."""
