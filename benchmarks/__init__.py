"""What is measured: cases, and the programs that measure them. The package never imports this."""
