package serve

import "runtime/debug"

// Version is the version of this program: the release it was built from, or the commit.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
}
