"""What the ROME example needs beside itself: a small model, an outside world with judges, actions, a table."""
