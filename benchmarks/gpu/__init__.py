"""What a step costs on one GPU: by hand, and through paceline."""
