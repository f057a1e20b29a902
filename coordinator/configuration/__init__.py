"""What stands behind `coordinator.config_file`: lines of keys, text to values, rules, values to text. Pure."""
