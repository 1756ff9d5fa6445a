"""Other tools' quantized checkpoints: scored as deployed where their own code runs here, else with dense weights."""
