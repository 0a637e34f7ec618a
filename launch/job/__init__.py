"""Programs inside a job: the batch process, the torchrun agents of its nodes, any other command."""
