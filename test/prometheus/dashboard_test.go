package prometheus

import (
	"encoding/json"
	"strings"
	"testing"
)

// dashboard is what we need to know of Grafana's model of a dashboard.
type dashboard struct {
	Panels     []panel
	Templating struct {
		List []struct{ Name, Type string }
	}
	Annotations struct {
		List []struct {
			Expr       string
			Datasource datasource
		}
	}
}

type panel struct {
	ID                       int
	Type, Title, Description string
	GridPos                  struct{ X, Y, W, H int }
	Datasource               datasource
	Targets                  []target
}

type target struct {
	RefID, Expr string
	Datasource  datasource
}

type datasource struct{ Type, UID string }

func loadDashboard(t *testing.T) dashboard {
	t.Helper()
	var d dashboard
	if err := json.Unmarshal([]byte(read(t, shipped(t, "dashboard.json"))), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// dashboardQueries returns the expressions of all panels, as they stand there.
func dashboardQueries(t *testing.T) []string {
	t.Helper()
	d := loadDashboard(t)
	var all []string
	for _, p := range d.Panels {
		for _, tgt := range p.Targets {
			all = append(all, tgt.Expr)
		}
	}
	for _, a := range d.Annotations.List {
		all = append(all, a.Expr)
	}
	if len(all) == 0 {
		t.Fatal("no queries")
	}
	return all
}

// filledIn replaces Grafana's variables as it does when everything is selected.
func filledIn(expr string) string {
	return strings.NewReplacer("$__rate_interval", "1m", "$policy", ".+", "$sidecar", ".+").Replace(expr)
}

// TestDashboard holds the dashboard against what Grafana needs and people see. TestAlerts runs its queries.
func TestDashboard(t *testing.T) {
	d := loadDashboard(t)
	var variables []string
	for _, v := range d.Templating.List {
		variables = append(variables, "$"+v.Name)
	}
	ids, cells := make(map[int]bool), make(map[[2]int]string)
	for _, p := range d.Panels {
		if p.Title == "" || ids[p.ID] {
			t.Errorf("panel %d, %q: no title, or not the first panel with this id", p.ID, p.Title)
		}
		ids[p.ID] = true
		if p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("%s: wider than the screen", p.Title)
		}
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				cell := [2]int{p.GridPos.X + x, p.GridPos.Y + y}
				if other := cells[cell]; other != "" {
					t.Fatalf("%s covers %s", p.Title, other)
				}
				cells[cell] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Description == "" || len(p.Targets) == 0 {
			t.Errorf("%s: no description or no query", p.Title)
		}
		for _, tgt := range p.Targets {
			if tgt.Datasource != (datasource{"prometheus", "${datasource}"}) {
				t.Errorf("%s: a fixed data source", p.Title)
			}
			if left := strings.NewReplacer("$__rate_interval", "", "$1", "").Replace(tgt.Expr); strings.Contains(strings.NewReplacer(pairs(variables)...).Replace(left), "$") {
				t.Errorf("%s: an unknown variable in %s", p.Title, tgt.Expr)
			}
		}
	}
}

// pairs are the arguments of a strings.Replacer that deletes.
func pairs(texts []string) []string {
	var all []string
	for _, text := range texts {
		all = append(all, text, "")
	}
	return all
}
