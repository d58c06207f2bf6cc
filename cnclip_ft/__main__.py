from cnclip_ft.cli import main

main()
