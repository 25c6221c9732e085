<?php

require_once __DIR__ . '/allowednets_sidecar.php';

/**
 * Lets a browser into a mailbox only from the networks that the mailbox is restricted to, by asking the sidecar on this
 * machine: before a password goes anywhere, and on every request of a session. Whatever is no clear yes is a no.
 *
 * Make it the first in $config['plugins']: what another plugin does before it is done unasked.
 */
class allowednets extends rcube_plugin
{
    /** What Dovecot is told when the browser's address is unknown: an address that no list can hold. */
    private const NO_ADDRESS = '0.0.0.0';

    private allowednets_sidecar $sidecar;

    /** How many seconds the sidecar's yes holds for a session. */
    private float $cache_seconds;

    /** @var array<string, allowednets_answer> The sidecar's answers in this request, by name. */
    private array $answers = [];

    /** What a person reads who was refused when Roundcube connected to the mail server. */
    private ?string $refusal = null;

    /**
     * Reads the settings, before Roundcube replaces settings by those that users have saved.
     */
    public function onload(): void
    {
        $this->load_config();
        $config = rcube::get_instance()->config;
        $this->sidecar = new allowednets_sidecar(
            (string) $config->get('allowednets_sidecar', 'http://127.0.0.1:7480'),
            (string) $config->get('allowednets_token', ''),
        );
        $this->cache_seconds = min(30.0, max(0.0, (float) $config->get('allowednets_cache_seconds', 3)));
    }

    /**
     * For all tasks, AJAX and frames included.
     */
    public function init(): void
    {
        $this->add_texts('localization/');
        $this->add_hook('startup', [$this, 'startup']);
        $this->add_hook('authenticate', [$this, 'authenticate']);
        $this->add_hook('storage_connect', [$this, 'storage_connect']);
        $this->add_hook('login_failed', [$this, 'login_failed']);
    }

    /**
     * Every request passes here before anything else of Roundcube looks at it.
     */
    public function startup(array $args): array
    {
        if (empty($_SESSION['user_id'])) {
            $this->show_kept_text();
            return $args;
        }
        $user = (string) ($_SESSION['username'] ?? '');
        if ($this->was_allowed($user)) {
            $this->answers[$user] = allowednets_answer::Allow;
            return $args;
        }
        $answer = $this->ask($user);
        if ($answer === allowednets_answer::Allow) {
            $_SESSION['allowednets'] = ['for' => $this->cache_key($user), 'at' => microtime(true)];
            return $args;
        }
        $text = $this->text($answer, $user);
        // Nothing is known against the session. It waits, so that a restart of the sidecar does not cost people their drafts.
        if ($answer === allowednets_answer::None && $args['task'] !== 'logout') {
            $this->put_off($text);
        }
        $this->end_session($text);
        return ['task' => 'login', 'action' => ''] + $args;
    }

    /**
     * Somebody logs in. What is refused here gets its text and never reaches the mail server.
     */
    public function authenticate(array $args): array
    {
        $name = (string) $args['user'];
        if (empty($args['valid']) || !empty($args['abort']) || $name === '') {
            return $args; // Roundcube refuses it
        }
        $answer = $this->ask($this->complete($name, $args['host'] ?? null));
        if ($answer !== allowednets_answer::Allow) {
            $args['abort'] = true;
            $args['error'] = $this->text($answer, $name);
        }
        return $args;
    }

    /**
     * Roundcube is about to connect, under the name it finally uses: after username_domain, virtual users and other plugins,
     * and for OAuth, which authenticate() never sees. Dovecot is told whom it is for.
     */
    public function storage_connect(array $args): array
    {
        $user = (string) $args['user'];
        $answer = $this->ask($user);
        if ($answer !== allowednets_answer::Allow) {
            $this->refusal = $this->text($answer, $user);
            $args['host'] = ''; // the way to keep Roundcube from connecting: see rcube_imap_generic::connect()
            $args['retry'] = false;
            return $args;
        }
        // The names of the first ID command are the ones that count, and it must name one address only.
        $args['preauth_ident'] = [
            'x-originating-ip' => $this->address() ?: self::NO_ADDRESS,
            'x-forward-via' => 'webmail',
        ] + (array) ($args['preauth_ident'] ?? []);
        return $args;
    }

    /**
     * Roundcube has said "Login failed" without knowing why.
     */
    public function login_failed(array $args): array
    {
        if ($this->refusal !== null) {
            rcmail::get_instance()->output->show_message($this->refusal, 'error', null, true, -1);
        }
        return $args;
    }

    /**
     * The text of a page that could not be shown.
     */
    public function error_page(array $args): array
    {
        return ['title' => $this->gettext('noanswertitle'), 'text' => $this->gettext('noanswer')] + $args;
    }

    private function ask(string $user): allowednets_answer
    {
        if (!isset($this->answers[$user])) {
            try {
                $this->answers[$user] = $this->sidecar->ask($user, $this->address());
            } catch (allowednets_no_answer $e) {
                rcube::write_log('errors', 'Allowed Nets: no answer from the sidecar, access refused: ' . $e->getMessage());
                $this->answers[$user] = allowednets_answer::None;
            }
        }
        return $this->answers[$user];
    }

    /**
     * The name that rcmail::login() makes of what was typed, as far as the sidecar would not make the same of it.
     */
    private function complete(string $name, mixed $host): string
    {
        $config = rcmail::get_instance()->config;
        $domain = $config->get('username_domain');
        if (empty($domain)) {
            return $name;
        }
        $host = $host ?: $config->get('imap_host', 'localhost:143');
        if (is_array($host)) {
            $host = is_numeric(key($host)) ? current($host) : key($host);
        }
        [$host] = rcube_utils::parse_host_uri(rcube_utils::parse_host((string) $host), 143, 993);
        $domain = rcube_utils::parse_host((string) (is_array($domain) ? $domain[$host] ?? '' : $domain), $host);
        $at = strpos($name, '@');
        if (empty($domain) || $at !== false && !$config->get('username_domain_forced')) {
            return $name;
        }
        return ($at === false ? $name : substr($name, 0, $at)) . '@' . $domain;
    }

    /**
     * The browser's address, or an empty string if what Roundcube knows is none.
     */
    private function address(): string
    {
        $address = rcube_utils::remote_addr();
        if (filter_var($address, FILTER_VALIDATE_IP) === false) {
            return '';
        }
        $octets = inet_pton($address);
        $mapped = str_repeat("\0", 10) . "\xff\xff"; // an IPv4 address as a socket for both families shows it
        return str_starts_with($octets, $mapped) && strlen($octets) === 16 ? inet_ntop(substr($octets, 12)) : $address;
    }

    /**
     * What a person reads, as HTML: Roundcube puts its messages into pages as they are.
     */
    private function text(allowednets_answer $answer, string $name): string
    {
        if ($answer === allowednets_answer::Deny && $this->address() === '') {
            return $this->gettext('deniedunknown');
        }
        return match ($answer) {
            allowednets_answer::Deny => $this->gettext(['name' => 'denied', 'vars' => ['address' => rcube::Q($this->address())]]),
            allowednets_answer::NoMailbox => $this->gettext(['name' => 'nomailbox', 'vars' => ['name' => self::quote($name)]]),
            default => $this->gettext('noanswer'),
        };
    }

    /**
     * A name as somebody typed it, in one short line of HTML.
     */
    private static function quote(string $name): string
    {
        return rcube::Q(mb_strimwidth(preg_replace('/[[:cntrl:]]+/u', ' ', mb_scrub($name)), 0, 80, '…'));
    }

    private function cache_key(string $user): string
    {
        return hash('sha256', $user . "\n" . $this->address());
    }

    /**
     * Whether the sidecar has said yes to this user at this address a moment ago.
     */
    private function was_allowed(string $user): bool
    {
        $kept = $_SESSION['allowednets'] ?? null;
        $age = microtime(true) - (float) ($kept['at'] ?? 0);
        return is_array($kept) && ($kept['for'] ?? '') === $this->cache_key($user) && $age >= 0 && $age < $this->cache_seconds;
    }

    private function end_session(string $text): void
    {
        $rcmail = rcmail::get_instance();
        $rcmail->kill_session();
        $rcmail->output->show_message($text, 'error', null, true, -1);
        if (!$this->is_whole_page()) {
            $_SESSION['allowednets_text'] = $text; // Roundcube's script goes to the login page by itself, seconds later
        }
        $this->be_login_page();
    }

    /**
     * Shows on the login page why the session ended, after a script has brought the browser there.
     */
    private function show_kept_text(): void
    {
        $rcmail = rcmail::get_instance();
        $text = $_SESSION['allowednets_text'] ?? '';
        if ($text !== '' && $this->is_whole_page()) {
            $rcmail->session->remove('allowednets_text');
            $rcmail->output->show_message($text, 'error', null, true, -1);
            $this->be_login_page();
        }
    }

    /**
     * Whether the answer is a page of its own: neither one inside another nor one for a script.
     */
    private function is_whole_page(): bool
    {
        return rcmail::get_instance()->output->type === 'html' && empty($_REQUEST['_framed']);
    }

    /**
     * Makes Roundcube take the request for one to the login page. Otherwise it adds that the session is invalid, which
     * sounds as if logging in again would help.
     */
    private function be_login_page(): void
    {
        $_GET['_task'] = $_POST['_task'] = 'login';
        unset($_REQUEST['_err']);
    }

    /**
     * Answers the request with the text and nothing else, and ends.
     */
    private function put_off(string $text): void
    {
        $output = rcmail::get_instance()->output;
        if ($output->type === 'js') {
            $output->show_message($text, 'error');
            $output->send();
        }
        header('Retry-After: 5');
        http_response_code(503);
        $this->add_hook('error_page', [$this, 'error_page']);
        $output->raise_error(503, '');
    }
}
