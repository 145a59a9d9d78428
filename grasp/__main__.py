from grasp.cli import main

main()
