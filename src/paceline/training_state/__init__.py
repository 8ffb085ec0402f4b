"""What the state of a run is, when and where it is saved, and how it comes back."""
