"""What is trained: one object behind one Protocol."""
