"""The user's data: drawn, batched, and counted token by token. Knows no other room."""
