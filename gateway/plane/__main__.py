from gateway.plane.worker import main

main()
