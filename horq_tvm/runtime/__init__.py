"""What a device needs: the loader in Python, and in C what is linked into every library (horq.h is its interface)."""
