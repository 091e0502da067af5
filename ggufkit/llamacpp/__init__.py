"""The only room that touches llama.cpp: its tools, its libraries, its files."""
