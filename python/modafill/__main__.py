from modafill.cli import main

main()
