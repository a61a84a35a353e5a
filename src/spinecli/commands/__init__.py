"""One file per subcommand: options in, one library call, a rendered result out."""
