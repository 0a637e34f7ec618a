"""What runs inside a job: the batch script's program, the agents of its nodes, any other command."""
