"""`TrainingArguments`: its fields, its checks, and what it makes of them."""
