"""Where values come from: files, environment, flags; and where each was found."""
