// Command etcd is etcd, from the module that the policy service embeds, for clusters that no registry's image reaches.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
