"""Between the names of Accelerate and the core: settings as the core reads them, and the rules under which it runs."""
