"""What tests share: small problems, models and runs, a device that pretends, literal versions to compare with."""
