<?php

// Asks a sidecar as the plugin does: php ask.php WHERE TOKEN NAME ADDRESS. Prints the answer, and what kept it from one.

require __DIR__ . '/../allowednets/allowednets_sidecar.php';

error_reporting(E_ALL);
set_error_handler(static fn (int $level, string $message) => throw new ErrorException($message));

[, $where, $token, $name, $address] = $argv;
try {
    echo (new allowednets_sidecar($where, $token))->ask($name, $address)->name;
} catch (allowednets_no_answer $e) {
    echo 'None: ', $e->getMessage();
}
