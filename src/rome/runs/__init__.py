"""What a run is: its config, its optimizer, its folder, and the experiments that come with rome.

May import methods and what stands below."""
