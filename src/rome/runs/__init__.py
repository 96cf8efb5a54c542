"""Everything that defines a run: its config, its optimizer, its folder, and the experiments that come with rome.

May import methods and the packages below them."""
