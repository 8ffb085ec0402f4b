"""Programs written for Accelerate, on paceline."""
