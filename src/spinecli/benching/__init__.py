"""Speed and memory of models side by side on this machine, in the engines that would run them."""
