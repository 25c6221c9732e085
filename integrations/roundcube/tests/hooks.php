<?php

// Calls the plugin's hooks inside a real Roundcube, with a sidecar that always denies: php hooks.php INSTALL_PATH. Prints
// what is wrong, between what Roundcube has to say, and then fails; otherwise ends with "ok".

define('INSTALL_PATH', $argv[1] . '/');
require INSTALL_PATH . 'program/include/clisetup.php';

$failed = 0;
function check(string $what, mixed $got, mixed $want): void
{
    if ($got !== $want) {
        $GLOBALS['failed']++;
        echo $what, ': ', json_encode($got), ', want ', json_encode($want), "\n";
    }
}

/** Ends rcmail::login() where it would connect. */
final class Connecting extends Exception
{
}

$rcmail = rcmail::get_instance();
$plugin = $rcmail->plugins->get_plugin('allowednets');
$_SERVER['REMOTE_ADDR'] = '198.51.100.9';
$_SERVER['HTTP_HOST'] = 'webmail.example.net';
$_SERVER['SERVER_NAME'] = 'webmail.example.net';

// The name that is checked before the password goes anywhere is the one Roundcube logs in with.
$connecting = static fn (array $args) => throw new Connecting($args['user']);
$rcmail->plugins->register_hook('storage_connect', $connecting);
$complete = new ReflectionMethod($plugin, 'complete');
$settings = [
    [],
    ['username_domain' => 'example.org'],
    ['username_domain' => 'example.org', 'username_domain_forced' => true],
    ['username_domain' => ['127.0.0.1' => 'one.example', 'other' => 'two.example']],
    ['username_domain' => ['other' => 'two.example'], 'username_domain_forced' => true],
    ['username_domain' => '%d'],
    ['username_domain' => '%n', 'username_domain_forced' => true],
    ['username_domain' => '%h'],
    ['username_domain' => 'example.org', 'imap_host' => ['tls://other:143' => 'Other', '127.0.0.1:1' => 'One']],
    ['username_domain' => ['other' => 'two.example'], 'imap_host' => ['tls://other:143' => 'Other', '127.0.0.1:1' => 'One']],
    ['username_domain' => ['other' => 'two.example'], 'imap_host' => ['tls://other:143', '127.0.0.1:1']],
    ['username_domain' => 'example.org', 'login_lc' => 0],
];
$defaults = ['username_domain' => '', 'username_domain_forced' => false, 'imap_host' => '127.0.0.1:1', 'login_lc' => 2];
foreach ($settings as $i => $setting) {
    foreach ($setting + $defaults as $name => $value) {
        $rcmail->config->set($name, $value);
    }
    foreach (['alice', 'Alice', 'alice@example.net', 'ALICE@Example.NET', 'alice@', '@', 'a@b@example.net', '0'] as $typed) {
        foreach ([null, $rcmail->autoselect_host(), 'ssl://other'] as $host) {
            $connected = null;
            try {
                $rcmail->login($typed, 'password', $host);
            } catch (Connecting $e) {
                $connected = $e->getMessage();
            }
            if ($connected !== null) {
                $checked = mb_strtolower($complete->invoke($plugin, $typed, $host));
                check("setting $i, host $host, name $typed", $checked, mb_strtolower($connected));
            }
        }
    }
}
$rcmail->plugins->unregister_hook('storage_connect', $connecting);

// Who comes past authenticate(), as OAuth does, does not get to the mail server either.
$server = stream_socket_server('tcp://127.0.0.1:0');
$rcmail->config->set('imap_host', stream_socket_get_name($server, false));
check('login', $rcmail->login('alice@example.org', 'password'), false);
check('connection to the mail server', @stream_socket_accept($server, 0), false);

// What other plugins and requests say before us.
$login = ['user' => 'alice@example.org', 'pass' => 'password', 'host' => null, 'valid' => true, 'abort' => false, 'error' => null];
check('a login', $plugin->authenticate($login)['abort'], true);
check('a forged request', $plugin->authenticate(['valid' => false] + $login), ['valid' => false] + $login);
check('an aborted login', $plugin->authenticate(['abort' => true, 'error' => 'x'] + $login), ['abort' => true, 'error' => 'x'] + $login);

// When the last answer of a session counts.
$rcmail->session = new class () {
    public function __call(string $name, array $args): void
    {
    }
};
$key = (new ReflectionMethod($plugin, 'cache_key'))->invoke($plugin, 'alice@example.org');
$page = ['task' => 'mail', 'action' => 'show', 'abort' => false];
foreach ([
    'of a moment ago' => [['for' => $key, 'at' => microtime(true) - 1], true],
    'too old' => [['for' => $key, 'at' => microtime(true) - 4], false],
    'of the future' => [['for' => $key, 'at' => microtime(true) + 60], false],
    'for somebody else' => [['for' => hash('sha256', "bob@example.org\n198.51.100.9"), 'at' => microtime(true)], false],
    'for another address' => [['for' => hash('sha256', "alice@example.org\n192.0.2.77"), 'at' => microtime(true)], false],
    'without a time' => [['for' => $key], false],
    'none' => [null, false],
    'nonsense' => ['yes', false],
] as $name => [$kept, $goes_on]) {
    $_SESSION = ['user_id' => 1, 'username' => 'alice@example.org', 'language' => 'en_US', 'allowednets' => $kept];
    check("answer $name", $plugin->startup($page), $goes_on ? $page : ['task' => 'login', 'action' => ''] + $page);
    check("session with an answer $name", isset($_SESSION['user_id']), $goes_on);
    (new ReflectionProperty($plugin, 'answers'))->setValue($plugin, []);
}

echo $failed ? "not ok\n" : "ok\n";
exit($failed ? 1 : 0);
