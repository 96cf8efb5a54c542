"""What every other package stands on: components named by ``kind``, errors that explain themselves, random streams,
files that a kill cannot break, devices, processes, and whose code may run. Imports nothing of rome."""
