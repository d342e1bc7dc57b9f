"""The training loop and what it needs: batches, loss, optimisers, checkpoints, previews, records."""
